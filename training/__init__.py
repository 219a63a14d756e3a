"""What the training scripts share.

In the order to read them:

    plan.py             from flags to a run
    recipe.py           every setting of training
    loop.py             epochs
    step.py             a batch
    loss.py             what is minimised
    optimiser.py        rates, decay, the average of the weights
    evaluate.py         a network that is not trained
    teacher.py          learning from a finished run
    other_hospitals.py  images that join training
    seen.py             what an earlier run has seen
"""
