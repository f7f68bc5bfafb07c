"""`python -m ovforge` is the program `ovforge`."""

from ovforge.cli import main

if __name__ == "__main__":
    main()
