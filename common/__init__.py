"""What every room stands on: starting and stopping, files, flags, the device, the question asked. Imports
nothing of the project but itself.

Read console.py (errors and notes), then files.py, cli.py and task.py; the others when you need them.
"""
