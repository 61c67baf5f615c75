"""Recipes that run the commands many times and compare their results."""

from common.script_folder import leave_script_folder

leave_script_folder(__file__)
