"""Places to act in: tabletop.py, embedded; calvin.py, CALVIN's simulator, and expert.py, who acts there."""
