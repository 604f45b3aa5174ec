"""Benchmarks of FastLSTM against nn.LSTM: named shapes, interleaved timing, JSON records and plots.

shapes.py names the problems, workload.py makes one runnable, timing.py measures, runner.py ties the three
together, record.py holds the JSON, plot.py draws it. Used by `fastlstm bench` and the scripts in benchmarks/.
"""
