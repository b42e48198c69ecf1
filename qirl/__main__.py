"""`python -m qirl`, and `torchrun ... -m qirl`."""

from qirl.cli import main

if __name__ == "__main__":
    main()
