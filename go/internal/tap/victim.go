package tap

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// victimMax is how much victim allocates at most: a container that has no limit after all must not take its node's memory.
const victimMax = 128 << 20

// victim uses up the memory limit of its container, once: it writes a file, and the next run, which finds the file, does
// nothing. It ends with an error if nobody kills it.
func victim(name string, stdout io.Writer) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		fmt.Fprintf(stdout, "killed before: %s exists\n", name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("create the file of the victim: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("create the file of the victim: %w", err)
	}
	memory := make([]byte, victimMax) // of the kernel, page by page as it is written to
	for i := 0; i < len(memory); i += os.Getpagesize() {
		memory[i] = 1
	}
	return fmt.Errorf("still alive with %d MiB: this container has no lower memory limit, or it has swap", victimMax>>20)
}
