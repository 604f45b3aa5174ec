"""A language model to train and use with FastLSTM: embedding -> LSTM stack -> softmax.

The commands are `fastlstm train`, `generate` and `demo` (`cli.py`, `demo.py`). In a program: `config.preset`
gives settings, `train.train` runs a training in a folder, `generate.load_model` and `generate.generate` use
the result, `model.LSTMLanguageModel` is the model itself. Needs the extra `[lm]`; the rest of the package
does not.
"""
