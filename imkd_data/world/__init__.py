"""A synthetic world in nuScenes form: LiDAR, radar and cameras that differ the way real sensors do."""

from imkd_data.world.options import WorldOptions
from imkd_data.world.write import world_options, write_world

__all__ = ["WorldOptions", "world_options", "write_world"]
