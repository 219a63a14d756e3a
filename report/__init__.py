"""What compare.py prints and draws, from the files of calibrated runs. No torch.

Read rows.py (what is compared with what), tables.py and findings.py (the report's tables), evidence.py (what
lies beside them), plots.py, render.py (markdown and HTML).
"""
