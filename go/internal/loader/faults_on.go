//go:build faults

package loader

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

// faults puts the wrong field into the program (src/faults.bpf.h) that OOM_TRACER_FAULT numbers, so that
// the tests can show that they find it. The object must have been built with OOM_FAULTS.
func faults() []variable {
	number, _ := strconv.ParseUint(os.Getenv("OOM_TRACER_FAULT"), 10, 32)
	return []variable{{"oom_fault", uint32(number)}}
}

// lacks says which functions are as if this kernel had no entry of them: those that OOM_TRACER_LACKS names.
func lacks(function string) bool {
	return slices.Contains(strings.Split(os.Getenv("OOM_TRACER_LACKS"), ","), function)
}
