"""What the training scripts share.

In the order to read them:

    plan.py             from flags to plans, and from a plan to a run
    recipe.py           every setting of training
    loop.py             epochs
    step.py             the gradient of a batch, rates, AdamW, the average of the weights
    loss.py             what is minimised
    resume.py           going on with an interrupted run
    evaluate.py         a network that is not trained
    other_hospitals.py  images that join training
    seen.py             what an earlier run has seen
    earlier/            what an earlier run gives: an encoder, or its answers
"""
