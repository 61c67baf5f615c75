"""The commands people type."""

from common.script_folder import leave_script_folder

leave_script_folder(__file__)
