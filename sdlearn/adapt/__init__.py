"Make it yours: new words, small changes of weights, learned from a few pictures"
