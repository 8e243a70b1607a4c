"""Scoring of tasks, one file per kind, all with the same functions:

    examples(task, tokenizer, cell)            rows as the model reads them
    predict(stepper, task, rows, tokenizer, cell)  the model's answer to each row
    is_right(task, predictions, rows)          whether each answer is right; None for
                                               numbers, which are near or far
    scores(task, predictions, rows)            every value of the metric, by name
    row_scores(task, predictions, rows)        what each row contributes to a score that
                                               is not a mean over rows; None otherwise
    majority(task)                             the same for a constant answer

`labels` is for classifiers, `images` for those of images, `numbers` for regression,
`tokens` for texts of which every token is predicted, `recall` for facts known by heart,
`answers` for language models, by the metrics of `rules` with exact match and F1 of
`normalised`.
"""
