"""One module a data set: what its publisher's folders hold, told as `base.Sample`s; `registry` lists them."""
