"""Whatever is wrong with a run file is named, all at once: the line, what was found, what was expected."""

from __future__ import annotations

import pytest

from dataflex.config import load
from tests.run_file import refusal, write

pytestmark = pytest.mark.usefixtures("run_folder")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # unknown keys
        ("learning_rat: 1", ["run.yaml:16: learning_rat: found an unknown key", "did you mean 'learning_rate'?"]),
        ("update_steps: 5", ["update_steps: found an unknown key", "did you mean 'update_step'?"]),
        ("store: x", ["store: found an unknown key; expected it under dataflex: (dataflex.store)"]),
        (
            "dataflex: {stroage: int8}",
            ["dataflex.stroage: found an unknown key; expected one of store, ", "'storage'?"],
        ),
        ("dataflex: {warmup_step: 3}", ["dataflex.warmup_step: ", "expected warmup_step at the top level"]),
        ("dataflex: {refresh: {fraction: 0.2}}", ["dataflex.refresh.fraction: ", "did you mean 'refresh_fraction'?"]),
        (
            "dataflex: {params: {proj_dims: 2}}",
            ["dataflex.params.proj_dims: ", "one of gradient_type, ", "'proj_dim'?"],
        ),
        ("true: 1", ["run.yaml: True: found true; expected text as a key (quote it)"]),
        # values of LLaMA-Factory's keys
        ("learning_rate: '1e-4'", ["learning_rate: found '1e-4'; expected a number (without quotes)"]),
        ("learning_rate: .nan", ["learning_rate: found nan; expected a finite number"]),
        ("lora_rank: 8.5", ["lora_rank: found 8.5; expected a whole number"]),
        ("lora_rank:", ["lora_rank: found nothing (null); expected a whole number (leave the key out"]),
        ("save_strategy: no", ["save_strategy: found false; expected text (YAML reads unquoted yes, no,"]),
        ("packing: 'true'", ["packing: found 'true'; expected true or false (without quotes)"]),
        ("stage: stf", ["stage: found 'stf'; expected one of pt, sft, ", "did you mean 'sft'?"]),
        ("gradient_accumulation_steps: 0", ["gradient_accumulation_steps: found 0; expected at least 1"]),
        ("num_train_epochs: -1", ["num_train_epochs: found -1; expected more than 0"]),
        ("hf_hub_token: 123", ["hf_hub_token: found a value (not shown); expected text"]),
        ("lr_scheduler_type: constnat", ["found 'constnat'; expected one of linear, cosine, ", "'constant'?"]),
        ("optim: adamw_hf", ["optim: found 'adamw_hf'; expected one of adamw_torch, "]),
        ("flash_attn: fa22", ["flash_attn: found 'fa22'; expected one of auto, disabled, sdpa, ", "'fa2'?"]),
        ("log_level: warn", ["log_level: found 'warn'; expected one of detail, debug, ", "'warning'?"]),
        ("ddp_backend: ncl", ["ddp_backend: found 'ncl'; expected one of nccl, gloo, ", "'nccl'?"]),
        (
            "eval_strategy: no",
            ["eval_strategy: found false; expected text (YAML", "quote it): one of no, steps, epoch"],
        ),
        ("seed: -1", ["run.yaml:16: seed: found -1; expected at least 0"]),
        ("data_seed: 4294967296", ["data_seed: found 4294967296; expected at most 4294967295"]),
        ("warmup_ratio: 5", ["warmup_ratio: found 5; expected at most 1"]),
        ("max_samples: 3000000000", ["max_samples: found 3000000000; expected at most 2147483647"]),
        ("dataset: [pool, [target]]", ["dataset: found ['pool', ['target']]; expected text, or a list of texts"]),
        ("lora_rank: 1" + 30 * "0", ["run.yaml: found a whole number beyond 9007199254740992; expected a smaller one"]),
        # what Transformers would only say by a traceback
        (
            "load_best_model_at_end: true\nsave_strategy: steps\neval_strategy: epoch",
            ["save_strategy: found 'steps'; expected epoch, as eval_strategy, or best. load_best_model_at_end needs"],
        ),
        (
            "load_best_model_at_end: true\neval_strategy: steps\nsave_steps: 30\neval_steps: 20",
            ["save_steps: found 30; expected a multiple of eval_steps. load_best_model_at_end needs an evaluation at"],
        ),
        (
            "load_best_model_at_end: true",
            ["eval_strategy: found nothing; expected steps or epoch. load_best_model_at_"],
        ),
        (
            "lr_scheduler_type: reduce_lr_on_plateau",
            ["eval_strategy: found nothing; expected steps or epoch. lr_sched"],
        ),
        (
            "early_stopping_steps: 3\neval_strategy: epoch",
            ["metric_for_best_model: found nothing; expected the metric that early_stopping_steps goes by, such as"],
        ),
        (
            "load_best_model_at_end: true\neval_strategy: steps\nsave_steps: 20\neval_steps: 10\n"
            "eval_on_each_dataset: true\neval_dataset: pool, target",
            [
                "metric_for_best_model: found nothing; expected the metric that picks the best model: eval_pool_loss "
                "or eval_target_loss. With eval_on_each_dataset each set is measured under its own name"
            ],
        ),
        (
            "metric_for_best_model: eval_los\neval_strategy: epoch",
            ["metric_for_best_model: found 'eval_los'; expected the metric that picks ", "did you mean 'eval_loss'?"],
        ),
        ("logging_steps: 0", ["logging_steps: found 0; expected more than 0, or logging_strategy: no"]),
        # trackers, output, stores
        ("report_to: wandbb", ["report_to: found 'wandbb'; expected one of all, azure_ml, ", "did you mean 'wandb'?"]),
        (
            "report_to: [neptune]",
            [
                "report_to: found 'neptune'; expected a tracker whose package is installed; found no neptune",
                "pip install",
            ],
        ),
        (
            "output_dir: /dev/null",
            ["output_dir: found '/dev/null'; expected a folder that can be written to; /dev/null"],
        ),
        ("output_dir: model/config.json/x", ["model/config.json is no folder"]),
        ("tokenized_path: /dev/null", ["tokenized_path: found '/dev/null'; expected a folder that can be written to;"]),
        ("cache_dir: /dev/null/x", ["cache_dir: found '/dev/null/x'; expected a folder that can be written to; /dev/"]),
        ("logging_dir: model/config.json", ["logging_dir: found 'model/config.json'; expected a folder that can be"]),
        ("output_dir: ''", ["output_dir: found ''; expected a folder for the run's output"]),
        (
            "dataflex: {store: 'nosuch://x'}",
            ["dataflex.store: found 'nosuch://x'; expected a path, or a URL that fsspec"],
        ),
        (
            "dataflex: {store: 's3://'}",
            ["dataflex.store: found 's3://'; expected a URL with a bucket or folder, as s3://"],
        ),
        ("dataflex: {store: model/config.json}", ["config.json'; expected a folder, or one that can be made"]),
        # what a method could only have said after its features
        (
            "dataflex: {params: {similarity: whitened_cosine}}",
            ["dataflex.params: similarity: found whitened_cosine with 8192 numbers per gradient; expected at most"],
        ),
        (
            "component_name: composed\ndataflex: {params: {similarity: whitened_cosine, "
            "representation: {kind: gradient, proj_dim: 4097}}}",
            ["found whitened_cosine with 4097 numbers per gradient"],
        ),
        (
            "component_name: nice\ntrain_on_prompt: true\ndataflex: {params: {reward: {type: exact_match}}}",
            ["train_on_prompt: found true; expected no such key. Policy gradients are of responses to a row's prompt"],
        ),
        (
            "component_name: nice\ndataflex: {params: {reward: {type: exact_mtch}}}",
            ["dataflex.params: found", "found 'exact_mtch'; expected a reward (", "did you mean 'exact_match'"],
        ),
        (
            "component_name: nice\ndataflex: {params: {reward: {type: judge, base_url: x}}}",
            ["reward judge: model: Field required"],
        ),
        (
            "component_name: nice\nstage: pt\ndataflex: {params: {reward: {type: exact_match}}}",
            ["stage: found 'pt'; expected sft. Policy gradients are of responses"],
        ),
        (
            "component_name: embedding\ndataflex: {params: {embedding_model_name_or_path: ./nosuch/enc}}",
            ["embedding_model_name_or_path: found './nosuch/enc'; expected a folder that exists, or a name on the Hub"],
        ),
        (
            "component_name: cluster_less\ndataflex: {params: {embedding_model_name_or_path: no/such/enc}}",
            ["found 'no/such/enc'; expected a folder that exists"],
        ),
        (
            "component_name: tsds\ndataflex: {params: {representation: {kind: embedding, "
            "embedding_model_name_or_path: data/pool.json}}}",
            ["found 'data/pool.json'; expected a folder that exists"],
        ),
        (
            "dataflex: {features: [{kind: embedding, embedding_model_name_or_path: data}]}",
            ["found data without modules.json and config.json; expected the folder of an encoder"],
        ),
        # values of DataFlex's flat keys
        (
            "train_type: dynamic_selct",
            ["train_type: found 'dynamic_selct'; expected static, dynamic", "'dynamic_select'?"],
        ),
        ("train_type: dynamic_mix", ["component_name: found 'less'; expected a mixer (ado, "]),
        ("train_type: dynamic_weight", ["component_name: found 'less'; expected a weighter (adapt, "]),
        ("warmup_step: -1", ["run.yaml:15: warmup_step: found -1; expected greater than or equal to 0"]),
        ("update_step: 2.5", ["update_step: found 2.5; expected a whole number"]),
        ("update_step: true", ["update_step: found true; expected a whole number"]),
        ("train_step: '30'", ["train_step: found '30'; expected a whole number"]),
        (
            "early_stopping_min_delta: -0.1",
            ["early_stopping_min_delta: found -0.1; expected greater than or equal to 0"],
        ),
        ("dataset: 'pool,,pool'", ["dataset: found 'pool,,pool'; expected a name between any two commas"]),
        ("dataflex: {store: ''}", ["dataflex.store: found ''; expected "]),
        (
            "dataflex: {params: {proj_dim: 10000000}}",
            ["dataflex.params.proj_dim: found 10000000; expected less than or equal to 2097152"],
        ),
        ("dataflex: {params: {proj_dim: 4, sparsity: 5}}", ["expected sparsity of at most proj_dim, 4"]),
        ("component_name: ''", ["component_name: found ", "expected a selector, such as less or random"]),
        ("dataset: ''", ["dataset: found ''; expected names registered in dataset_info.json"]),
        ("model_name_or_path: ''", ["model_name_or_path: found ''; expected a model folder"]),
        ("template: ''", ["template: found ''; expected the name of a chat template"]),
        ("eval_dataset: []", ["eval_dataset: found nothing; expected registered names, or a val_size above 0"]),
        ("component_name: 3", ["component_name: found 3; expected text"]),
        (
            "component_name: ':'",
            ["component_name: found ':'; expected a selector by its name, as module:Class or file.py:Class"],
        ),
        ("component_name: .x:Y", ["component_name: found '.x'; expected the dotted name of a module"]),
        ("component_name: ./wrong.py:X", ["component_name: importing ./wrong.py failed: ", "(wrong.py, line 1)"]),
        ("update_times: 1000000000000", ["update_times: found 1000000000000; expected less than or equal to 10000000"]),
        ("update_times: 9999999", ["update_times: found 100000000 optimizer steps in all; expected at most 10000000"]),
        ("component_name: les", ["component_name: found 'les'; expected a selector (", "did you mean 'less'?"]),
        ("component_name: no_such.module:X", ["component_name: importing no_such.module failed"]),
        ("component_name: ./none.py:X", ["component_name: found no file", "none.py; expected a Python file"]),
        ("component_name: dataflex.selectors.less:Les", ["found no Les in dataflex.selectors.less", "'Less'?"]),
        # values of the dataflex mapping
        ("dataflex: 3", ["dataflex: found 3; expected a mapping of keys to values"]),
        ("dataflex: {1: 2}", ["dataflex.1: found 1; expected text as a key (quote it)"]),
        ("dataflex: {params: {1: 2}}", ["dataflex.params.1: found 1; expected text as a key (quote it)"]),
        ("dataflex: {refresh: {policy: sometimes}}", ["dataflex.refresh.policy: found 'sometimes'; expected full, "]),
        ("dataflex: {refresh: {policy: full, max_age: 3}}", ["dataflex.refresh: ", "expected policy: rotating"]),
        ("dataflex: {nonfinite_limit: 2}", ["dataflex.nonfinite_limit: found 2; expected less than or equal to 1"]),
        ("dataflex: {nonfinite_limit: .nan}", ["dataflex.nonfinite_limit: found nan; expected a finite number"]),
        ("dataflex: {storage: no}", ["dataflex.storage: found false; expected float32, float16, int8, int4 or int1"]),
        ("dataflex: {plugins: [./none.py]}", ["dataflex.plugins.0: found './none.py'; expected a file"]),
        ("dataflex: {store: '${oc.env:HOME}'}", ["dataflex.store: found '${oc.env:HOME}'; expected plain text"]),
        ("dataflex: {store: 's3:/bucket/x'}", ["dataflex.store: found 's3:/bucket/x'; expected s3://..., or a path"]),
        ("dataflex: {params: [1]}", ["dataflex.params: found [1]; expected a mapping of keys to values"]),
        (
            "component_name: loss\ndataflex: {params: {focus_weight: .inf}}",
            ["dataflex.params.focus_weight: found inf; expected a finite number"],
        ),
        ("dataflex: {params: {seed: '1'}}", ["dataflex.params.seed: found '1'; expected a whole number"]),
        (
            "dataflex: {params: {gradient_type: adm}}",
            ["params.gradient_type: found 'adm'; expected adam or sgd", "'adam'?"],
        ),
        ("dataflex: {params: {checkpoints: [gone]}}", ["dataflex.params: found 'gone'; expected checkpoint folders"]),
        (
            "dataflex: {features: [{kind: embeding}]}",
            ["dataflex.features.0.kind: found 'embeding'; expected loss, token_loss, embedding", "'embedding'?"],
        ),
        (
            "dataflex: {features: [{kind: gradient, projection: {dimm: 3}}]}",
            ["dataflex.features.0.projection.dimm: found an unknown key; expected one of type, dim, seed", "'dim'?"],
        ),
        # the components file
        (
            "components_cfg_file: gone.yaml",
            ["components_cfg_file: found 'gone.yaml'; expected a file", "Remove the key"],
        ),
        (
            "components_cfg_file: components.yaml\ncomponent_name: random",
            [
                "components.yaml:10: selectors.random.params.replacment: found an unknown key",
                "did you mean 'replacement'?",
            ],
        ),
        (
            "components_cfg_file: components.yaml\ncomponent_name: static",
            ["components.yaml:12: selectors.static.name: found 'statik'; expected static, as the entry is called"],
        ),
        (
            "components_cfg_file: components.yaml\ncomponent_name: dataflex.selectors.less:Less",
            ["components.yaml:1: selectors: found less, random, static; expected an entry dataflex.selectors.less:"],
        ),
        # combinations
        ("stage: dpo", ["stage: found 'dpo'; expected sft or pt. Other stages"]),
        ("packing: true", ["packing: found true; expected no such key. A packed block"]),
        ("neat_packing: true", ["neat_packing: found true; expected no such key. A packed block"]),
        ("streaming: true", ["streaming: found true; expected no such key. Rows of a stream"]),
        ("predict_with_generate: true", ["predict_with_generate: found true; ", "prompts without labels"]),
        ("use_dora: true", ["use_dora: found true; expected no such key. There is no exact per-example gradient"]),
        ("finetuning_type: oft", ["finetuning_type: found 'oft'; expected lora, full or freeze"]),
        (
            "use_galore: true\nfinetuning_type: full",
            ["use_galore: found true; ", "gradient_type: sgd and target_direction: sgd, or AdamW"],
        ),
        ("use_muon: true", ["use_muon: found true; expected no such key. gradient_type: adam takes the moments"]),
        ("optim: adafactor", ["optim: found 'adafactor'; expected one of adamw_torch, "]),
        (
            "quantization_bit: 8",
            ["quantization_bit: found bitsandbytes in 8 bits; expected bitsandbytes in 4 bits, or none", "In 8 bits"],
        ),
        ("use_unsloth: true", ["use_unsloth: found true; expected no such key. It replaces"]),
        ("mixture_of_depths: convert", ["mixture_of_depths: found 'convert'; expected no such key"]),
        ("max_steps: 30", ["max_steps: found 30; expected no such key. Set train_step: 30"]),
        ("val_size: 0.1", ["val_size: found 0.1; expected no val_size beside eval_dataset"]),
        (
            "dataflex: {params: {projection: factorized}}",
            ["dataflex.params.projection: found 'factorized'; expected sjlt or rademacher: normal and factorized were"],
        ),
        (
            "dataflex: {features: [{kind: gradient, projection: {type: normal}}]}",
            ["dataflex.features.0.projection.type: found 'normal'; expected sjlt or rademacher: normal and factorized"],
        ),
        # files
        ("model_name_or_path: ./gone", ["model_name_or_path: found './gone'; expected a folder that exists"]),
        ("model_name_or_path: data", ["model_name_or_path: found 'data'; expected a folder with config.json"]),
        (
            "resume_from_checkpoint: ./gone",
            ["resume_from_checkpoint: found './gone'; expected the folder of a checkpo"],
        ),
        (
            "component_name: static\ndataflex: {params: {path: gone.parquet}}",
            ["dataflex.params.path: found 'gone.parquet'; expected a file that exists, relative to the working folder"],
        ),
        (
            "dataflex: {params: {checkpoints: [model], weights: [1, 2]}}",
            ["dataflex.params: found", "expected as many weights as checkpoints"],
        ),
        (
            "dataflex: {params: {gradient_type: sgd, adam_variant: precond_only}}",
            ["dataflex.params: found", "expected no adam_variant: it acts with gradient_type: adam alone"],
        ),
        (
            "dataflex: {params: {over: rows}}",
            ["dataflex.params: found", "expected no over: it acts with aggregation: round_robin alone"],
        ),
        (
            "optim: sgd\ndataflex: {params: {gradient_type: sgd, target_direction: precond_only}}",
            [
                "optim: found 'sgd'; expected one of",
                "as target_direction: precond_only does; use gradient_type: sgd and",
            ],
        ),
        (
            "template: qwen3_nothing",
            ["template: found 'qwen3_nothing'; expected the name of a chat", "'qwen3_nothink'?"],
        ),
        ("fp16: true\nbf16: true", ["fp16: found true; expected no fp16 beside bf16: true"]),
        (
            "eval_strategy: steps\neval_dataset:\ncomponent_name: random",
            ["eval_dataset: found nothing; expected registered names, or a val_size above 0. eval_strategy is steps"],
        ),
        ("deepspeed: ds.json", ["deepspeed: found 'ds.json'; expected a JSON file that exists"]),
        ("dataset: pol", ["dataset: found 'pol'; expected a dataset registered in data/dataset_info.json", "'pool'?"]),
        (
            "dataset_dir: gone",
            ["dataset_dir: found no readable gone/dataset_info.json", "expected it to register pool"],
        ),
    ],
)
def test_one_problem_is_named(changes, expected):
    text = refusal(changes)
    assert text.startswith("1 problem in the configuration:\n  "), text
    assert "run.yaml" in text or "components.yaml" in text
    for fragment in expected:
        assert fragment in text


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("model_name_or_path", "model_name_or_path: found nothing; expected a model folder"),
        ("dataset", "dataset: found nothing; expected names registered"),
        ("template", "template: found nothing; expected the name of a chat template"),
        ("output_dir", "output_dir: found nothing; expected a folder"),
        ("do_train", "do_train: found nothing; expected true"),
        ("component_name", "component_name: found nothing; expected a selector"),
        ("eval_dataset", "eval_dataset: found nothing; expected registered names, or a val_size above 0"),
    ],
)
def test_missing_key(without, expected):
    text = refusal(without=(without,))
    assert text.startswith("1 problem")
    assert f"run.yaml: {expected}" in text


def test_everything_wrong_with_a_component_comes_at_once():
    """Unknown and wrong parameters, and what the right ones come to with each other and the rest of the run file."""
    params = "{proj_dims: 2, seed: x, checkpoints: [gone], projection: factorized}"
    text = refusal(f"dataflex: {{params: {params}, weighter: {{name: los}}}}\nuse_dora: true")
    for expected in (
        "dataflex.params.proj_dims: found an unknown key",
        "dataflex.params.seed: found 'x'",
        "dataflex.params: found 'gone'; expected checkpoint folders that exist",
        "dataflex.params.projection: found 'factorized'; expected sjlt or rademacher",
        "dataflex.weighter: found {'name': 'los'}; expected train_type: dynamic_mix beside it",
        "use_dora: found true",
    ):
        assert expected in text
    assert text.startswith("6 problems")


def test_what_several_keys_are_together_is_said_once():
    text = refusal("dataflex: {params: {proj_dims: 2, checkpoints: [model], weights: [1, 2]}}")
    assert text.startswith("2 problems")
    assert "expected as many weights as checkpoints" in text


@pytest.mark.parametrize(
    "changes",
    [
        "max_steps: 30\ntrain_step: 30",  # the same said twice
        "load_best_model_at_end: true\neval_strategy: steps\nsave_steps: 20\neval_steps: 10",
        "load_best_model_at_end: true\neval_strategy: epoch\nsave_strategy: best",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 0.1\nsave_steps: 0.2",
        "metric_for_best_model: accuracy\ncompute_accuracy: true\neval_strategy: epoch",
        "metric_for_best_model: target_loss\neval_on_each_dataset: true\neval_strategy: epoch",
        "report_to: none",
        "report_to: []",
        "report_to: all",
        "additional_target: embed_tokens,lm_head\nresize_vocab: true",
        "dataflex: {params: {similarity: whitened_cosine, proj_dim: 4096}}",
        "component_name: embedding\ndataflex: {params: {embedding_model_name_or_path: model}}",
        "component_name: embedding\ndataflex: {params: {embedding_model_name_or_path: a-name/on-the-hub}}",
        "train_on_prompt: true",
        "component_name: nice\ndataflex: {params: {reward: [{type: exact_match}, {type: number, weight: 0.5}]}}",
        "seed: 4294967295\nmax_grad_norm: -1\nsave_steps: -1\nsave_total_limit: 0\ndataloader_num_workers: 0",
        "max_steps: -1\npissa_iter: -1\nlocal_rank: -1\nfreeze_trainable_layers: -2\nwarmup_ratio: 1.0",
        "fsdp: ''\nneftune_noise_alpha: 5\ndebug: underflow_overflow",
    ],
)
def test_nothing_is_refused_without_ground(changes):
    assert load(write(changes))


def test_all_problems_come_at_once():
    text = refusal("stage: dpo\nlearning_rat: 1\nwarmup_step: -2\nlora_rank: x", overrides=("dataflex.storage=int2",))
    assert text.startswith("5 problems in the configuration:")
    assert len(text.splitlines()) == 6
