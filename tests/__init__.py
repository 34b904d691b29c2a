"""The tests of all files but model.py, one file a place; model.py's are in test_model.py."""
