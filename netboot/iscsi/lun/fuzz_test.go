package lun

import (
	"testing"
)

// FuzzHeader has any page be a header, or an error; what is one can be written again.
func FuzzHeader(f *testing.F) {
	f.Add((&header{size: 1 << 20, baseSize: 4096, id: "base"}).encode(), false)
	f.Add([]byte(magic), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal && len(b) <= pageSize-4 { // have it get past the checksum
			page := make([]byte, pageSize)
			copy(page, b)
			b = sealHeader(page)
		}
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if h.fileSize() < h.dataOff() || h.dataOff() < liveAt(h.sectors()-1)+sectorSize || h.sectors() < 1 || len(h.id) > maxID {
			t.Errorf("%+v: file of %d bytes, data at %d", h, h.fileSize(), h.dataOff())
		}
		if again, err := parseHeader(h.encode()); err != nil || *again != *h {
			t.Errorf("%+v becomes %+v, %v", h, again, err)
		}
	})
}

// FuzzSector has any sector be one of a map, or an error; what is one can be written again and is the same.
func FuzzSector(f *testing.F) {
	h := &header{size: perSector*clusterSize + 5*BlockSize}
	s := &sector{runs: []run{{0, 3, 99}, {1535, 1, 1}}}
	s.set(7, stateDelta)
	s.set(1535, stateZero)
	f.Add(h.encodeSector(nil, 0, s), int64(0), false)
	f.Add(make([]byte, sectorSize), int64(1), true)
	f.Fuzz(func(t *testing.T, b []byte, i int64, seal bool) {
		if len(b) != sectorSize || i < 0 || i > 1 {
			return
		}
		if seal {
			h.seal(b)
		}
		s, err := h.parseSector(b, i)
		if err != nil {
			return
		}
		again, err := h.parseSector(h.encodeSector(nil, i, s), i)
		if err != nil || again.words != s.words || len(again.runs) != len(s.runs) {
			t.Errorf("%+v becomes %+v, %v", s, again, err)
		}
		for _, r := range s.runs {
			if r.first < 0 || r.n < 1 || r.first+r.n > int(min(perSector, h.clusters()-i*perSector)) {
				t.Errorf("run %+v", r)
			}
		}
	})
}
