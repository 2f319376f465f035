"""The one entry: `accelerate launch train.py +experiment=NAME [overrides]`; without an experiment it lists them."""

from slimstep.__main__ import train

if __name__ == "__main__":
    train()
