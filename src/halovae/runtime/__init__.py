"""The public class: an autoencoder whose calls ranks share."""
