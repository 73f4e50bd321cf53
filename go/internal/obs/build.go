package obs

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker (-ldflags "-X …/go/internal/obs.version=… -X …/go/internal/obs.revision=…"), which
// can set nothing but a package's variable. Nothing else writes them, and only Version reads them.
var version, revision string

// Build says what a binary was built from.
type Build struct {
	Version  string // a tag, or what git describe says of the distance to one
	Revision string // the commit
	Go       string // the Go release
}

// Version says what this binary was built from: what the linker was told, else what the Go command
// recorded (`go install …@v1.2.3`, or a build with -buildvcs), else "unknown".
func Version() Build {
	info, _ := debug.ReadBuildInfo() // nil without module support
	return build(version, revision, info)
}

func build(version, revision string, info *debug.BuildInfo) Build {
	b := Build{Version: version, Revision: revision, Go: runtime.Version()}
	if info != nil {
		b.Version = cmp.Or(b.Version, info.Main.Version)
		vcs := map[string]string{}
		for _, s := range info.Settings {
			vcs[s.Key] = s.Value
		}
		if b.Revision == "" && vcs["vcs.revision"] != "" {
			b.Revision = vcs["vcs.revision"]
			if vcs["vcs.modified"] == "true" {
				b.Revision += "-dirty"
			}
		}
	}
	b.Version = cmp.Or(b.Version, "unknown")
	b.Revision = cmp.Or(b.Revision, "unknown")
	return b
}

// String is what --version prints after the program's name.
func (b Build) String() string {
	return fmt.Sprintf("%s (revision %s, %s %s/%s)", b.Version, b.Revision, b.Go, runtime.GOOS, runtime.GOARCH)
}
