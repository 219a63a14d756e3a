"""The report and the reading list as pages of one file each, which fetch nothing. No torch.

In the order to read them:

    build.py       blocks -> the page: templates, contents list, security policy
    numbers.py     what the page needs to compute figures at a threshold chosen by hand
    gallery.py     false negatives and false positives, with their pictures
    pictures.py    image files -> small JPEGs
    worklist.py    the reading list of predict.py

page.html, blocks.html, panel.html, gallery.html and worklist.html are Jinja2 templates; style.css and page.js
are embedded as they are.
"""
