"""`python -m camtrain`: the command line, where the script is not on the path."""

from camtrain.cli.main import main

if __name__ == "__main__":
    main()
