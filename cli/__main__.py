"""``python -m cli`` is ``imkd``: a training that starts its other ranks by module name needs one."""

from cli.main import model

if __name__ == "__main__":
    model()
