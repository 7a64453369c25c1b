"""The `pyllamarun` command."""

from pyllamarun.cli import main

if __name__ == "__main__":
    main()
