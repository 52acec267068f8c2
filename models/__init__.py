"""The networks. Imports torch and safetensors only; knows nothing of ranks, files of a run or the environment."""
