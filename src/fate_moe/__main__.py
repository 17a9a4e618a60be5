"""`python -m fate_moe` is `fate`."""

from fate_moe.cli import main

if __name__ == "__main__":
    main()
