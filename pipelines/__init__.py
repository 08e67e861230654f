"""The pipelines: the only places where the parts are put together."""

if __name__ != "dataflex.pipelines":
    raise ImportError(f"this package is dataflex.pipelines, not {__name__}: import dataflex.pipelines")
