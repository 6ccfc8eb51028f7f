"The idea, on digits: score, noise, steps, classes, autoencoder, contrast"
