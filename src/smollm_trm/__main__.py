"""`python -m smollm_trm <command>`."""

from smollm_trm.cli import main

if __name__ == "__main__":
    main()
