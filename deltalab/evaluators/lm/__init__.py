"""The parts of `lm_eval`: which tasks were asked for, on which data, sent how.

`asked` reads the settings, `tasks` and `data` find task files and rows, `requests` prepares what is
sent, `hflm` and `vllm` answer it; `run_code` is where HumanEval's programs run.
"""
