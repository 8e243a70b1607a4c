"""What a task asks of a model, one file per kind, all of one form:

    examples(task, tokenizer, cell)            rows as the model reads them
    predict(stepper, task, rows, tokenizer, cell)  what the model answers, row by row
    is_right(task, predictions, rows)          whether each answer is right
    scores(task, predictions, rows)            every value of the metric, by name
    majority(task)                             the same for always answering alike

`labels` is for classifiers, `answers` for language models, by the metrics of `rules`
with exact match and F1 of `normalised`.
"""
