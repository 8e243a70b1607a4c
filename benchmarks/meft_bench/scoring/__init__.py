"""What a task asks of a model, one file per kind, all of one form:

    examples(task, tokenizer, cell)            rows as the model reads them
    scores(stepper, task, rows, tokenizer, cell)   every value of the metric, by name
    majority(task)                             the same for always answering alike

`labels` is for classifiers, `answers` for language models.
"""
