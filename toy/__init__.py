"""The embedded world: a renderer, its oracle and the tiny models trained on it."""

from common.script_folder import leave_script_folder

leave_script_folder(__file__)
