"""What compare.py prints and draws, from the files of calibrated runs. No torch.

In the order to read them:

    rows.py      what is compared with what
    tables.py    the report's tables
    findings.py  the same for several findings
    evidence.py  what lies beside the figures
    plots.py     pictures
    render.py    markdown and HTML
"""
