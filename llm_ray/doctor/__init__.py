"""The checks of `llm-ray doctor`. Each check is a function that judges facts and returns findings; `collect` reads the
facts and calls the checks. Rules shared with preflight are in llm_ray/host/rules.py."""
