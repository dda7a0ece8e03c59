"""``imkd-data``: plan, build, verify, repair, inspect, export, bench, synth, doctor. Heavy imports happen inside commands."""

from __future__ import annotations

import click

from cli import data_build, data_check, data_use

__all__ = ["group"]


class _Group(click.Group):
    """Commands in the order of a day's work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="imkd", prog_name="imkd-data")
def group() -> None:
    """Build, check and use caches of camera-radar-LiDAR data.

    \b
    Examples:
      imkd-data plan  --split trainval                 what would be built, how long, how large
      imkd-data build --split trainval                 build it, or continue
      imkd-data verify caches/nuscenes-trainval        check it
      imkd-data inspect caches/nuscenes-trainval       look into it

    \b
    Exit codes: 0 done, 1 bug, 2 usage, 3 bad input, 4 damage found, 5 storage, 6 no progress, 7 locked,
    8 source missing, 9 other configuration or version, 130/143 interrupted (run it again to continue).
    """


for _command in (*data_build.COMMANDS, *data_check.COMMANDS, *data_use.COMMANDS):
    group.add_command(_command)
