package loader

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

// Whatever kallsyms says, a function has a beginning and an end, and no more functions are found than the program has room
// for.
func FuzzStackSymbols(f *testing.F) {
	files, err := filepath.Glob("testdata/kallsyms/*")
	if err != nil || len(files) == 0 {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, kallsyms []byte) {
		symbols, err := stackSymbols(bytes.NewReader(kallsyms))
		if err != nil && len(symbols) > 0 || len(symbols) > maxSymbols {
			t.Errorf("%d symbols, %v", len(symbols), err)
		}
		for _, s := range symbols {
			if s.Start == 0 || s.Start >= s.End {
				t.Errorf("a function from %#x to %#x", s.Start, s.End)
			}
		}
	})
}

// Whatever stands in a journal, its reader ends, and what it reads is a record of that seq.
func FuzzJournal(f *testing.F) {
	whole := &journal{memory: make([]byte, 4*SegmentSize), slots: 4, stride: SegmentSize}
	for seq := range uint64(5) {
		whole.put(seq + 1)
	}
	f.Add(whole.slot(0)[:256], []byte{}, uint64(3))
	f.Add(bytes.Repeat([]byte{0xff}, int(segmentHeader)), []byte{}, uint64(1))
	f.Fuzz(func(t *testing.T, first, second []byte, seq uint64) {
		j := &journal{memory: make([]byte, 4*SegmentSize), slots: 4, stride: SegmentSize}
		copy(j.slot(0), first)
		copy(j.slot(1), second)
		if record := j.read(seq); record != nil && (len(record) < recordPrefix || binary.NativeEndian.Uint64(record[seqOffset:]) != seq) {
			t.Errorf("record %x of seq %d", record, seq)
		}
	})
}
