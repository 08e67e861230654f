import json, time
import pytest, torch

def keys(workspace, **more):
    values = dict(train_type="dynamic_weight", component_name="loss", warmup_step=None, update_step=None, update_times=None,
        train_step=3, lora_dropout=0.0, save_strategy="no", save_steps=None, eval_dataset=None, learning_rate=1e-3,
        dataflex={"store": str(workspace.folder / "store"), "params": {"strategy": "uniform"}})
    return values | more

def losses(workspace, name):
    state = json.loads((workspace.folder/"out"/name/"trainer_state.json").read_text())
    return [e["loss"] for e in state["log_history"] if "loss" in e]

def test_probe(workspace):
    for stage in ("sft", "pt"):
        more = {} if stage == "sft" else dict(stage="pt", template=None, dataset="text", packing=False)
        for b, g in ((4,1),(2,2),(1,4)):
            t=time.time()
            bg = dict(per_device_train_batch_size=b, gradient_accumulation_steps=g)
            workspace.run("train", workspace.write("s", **keys(workspace, train_type="static", component_name=None, train_step=None, max_steps=3, dataflex=None, **bg, **more)), "overwrite_output_dir=true")
            t2=time.time()
            workspace.run("train", workspace.write("w", **keys(workspace, **bg, **more)), "overwrite_output_dir=true")
            print(stage, b, g, t2-t, time.time()-t2)
            print(losses(workspace, "s"), losses(workspace, "w"))
            a, c = workspace.weights("s"), workspace.weights("w")
            print(max(float((a[k]-c[k]).abs().max()) for k in a), max(float(v.abs().max()) for v in a.values()))
