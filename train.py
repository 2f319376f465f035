"""The one entry: `accelerate launch train.py +experiment=NAME [overrides]`; without an experiment it lists them."""

from engine.launch import main

if __name__ == "__main__":
    main()
