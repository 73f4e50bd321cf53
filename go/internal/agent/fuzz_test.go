package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// A state file is read whole or refused.
func FuzzReadState(f *testing.F) {
	f.Add([]byte(`{"boot_id":"b","time":"2026-01-01T00:00:00Z","clean":true,"kernel_oom_kills":7,"epoch":1,"seq":5,"acked":4,` +
		`"untold":[{"schema":"oom-tracer/v1","id":"a","cause":"wrapped"}],"held":{}}`))
	f.Add([]byte(`{"boot_id":"","time":null}`))
	path := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(path, "state"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		dir, err := statedir.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		s, err := readState(dir, "state")
		if (s == nil) == (err == nil) || s != nil && (s.BootID == "" || s.Time.IsZero()) {
			t.Errorf("%+v, %v", s, err)
		}
	})
}
