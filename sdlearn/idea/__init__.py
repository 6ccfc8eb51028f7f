"The idea, on digits: score, noise, autoencoder, contrast"
