# Placeholder of the lead until the real module lands: overwrite freely.
import click
@click.group()
def keys() -> None:
    """API keys."""
