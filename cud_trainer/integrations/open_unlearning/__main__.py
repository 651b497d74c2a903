"""`python -m cud_trainer.integrations.open_unlearning`."""

import sys

from .trainers import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
