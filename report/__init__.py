"""What compare.py prints and draws, from the files of calibrated runs. No torch.

In the order to read them:

    rows.py      what is compared with what
    answers/     which model, which threshold, can I trust it?
    view.py      what is shown, in which order
    tables/      text and tables
    cells.py     what tables are made of
    plots.py     pictures of one thing, on axes that are given
    figures.py   the pictures of the report
    folders.py   compare.py --list
    card.py      compare.py --card, with the text of card.jinja
    render.py    markdown
    page/        the report as a page, and the reading list of predict.py
"""
