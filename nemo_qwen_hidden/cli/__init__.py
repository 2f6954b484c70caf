"""The command line: Hydra settings and arguments in, exit status out. DictConfig goes no further down."""

PROGRAM = "nemo-qwen-hidden"
