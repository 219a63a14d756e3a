"""What compare.py prints and draws, from the files of calibrated runs. No torch.

In the order to read them:

    rows.py    what is compared with what
    tables/    text and tables
    cells.py   what tables are made of
    plots.py   pictures
    render.py  markdown
    page/      the report as a page, and the reading list of predict.py
"""
