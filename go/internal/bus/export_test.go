package bus

// EnsureBucket is the last step of EnsureStreams.
var EnsureBucket = ensureBucket
