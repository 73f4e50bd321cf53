package bus

import "time"

// EnsureBucket is the last step of EnsureStreams.
var EnsureBucket = ensureBucket

// SetPatience has p give up what is refused after d.
func SetPatience(p *Publisher, d time.Duration) { p.patience = d }
