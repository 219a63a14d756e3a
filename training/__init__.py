"""What the train_*.py and pretrain_mae.py scripts share.

Read plan.py (from flags to a run), recipe.py (every setting), loop.py (epochs), step.py (a batch), loss.py,
optimiser.py, evaluate.py (a frozen network). teacher.py, other_hospitals.py and seen.py serve single flags.
"""
