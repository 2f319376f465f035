"""A CUDA device that is not there: its tensors are fake, the CPU's are real, and what a GPU would refuse raises."""
