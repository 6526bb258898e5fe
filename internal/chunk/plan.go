package chunk

import "fmt"

// A Kind is where chunks come from.
type Kind uint8

// The kinds of sources.
const (
	Here Kind = iota // what is here already, or comes earlier in the same image
	Pack             // frames of the pack, one for each chunk
	Segs             // whole segments
)

// A Step brings chunks that follow one another.
type Step struct {
	Kind        Kind
	First, Last int   // indexes of its chunks, Last not with them
	Off, Size   int64 // bytes of the pack or of the segments file; 0 of what is here
	Segs        []SegmentRange
}

// A SegmentRange is a segment of a Step.
type SegmentRange struct {
	First, Last int   // indexes of its chunks, Last not with them
	Size        int64 // bytes of its frame
	Raw         int64 // bytes of the image
}

// partCost is what a further range costs in an answer: the header of a part of a multipart/byteranges (RFC 9110 section 14.6).
const partCost = 160

// Plan says how to get the chunks from index from on, which must begin an image or follow what is there of it, with the
// fewest bytes; chunks are all of the index. has says what is here.
func Plan(x *Index, chunks []Chunk, from int, has func(ID) bool) ([]Step, error) {
	p := planner{x: x, chunks: chunks, here: make([]bool, len(chunks)), packOff: make([]int64, len(chunks)+1)}
	seen := make(map[ID]struct{}, len(chunks))
	for i, c := range chunks {
		_, again := seen[c.ID]
		p.here[i] = again || has(c.ID)
		seen[c.ID] = struct{}{}
		p.packOff[i+1] = p.packOff[i] + int64(c.Packed)
	}
	ends := segments(chunks, x.Meta)
	if len(ends) != len(x.Segs) {
		return nil, fmt.Errorf("%w: it has %d segments, and they would be %d", ErrWrong, len(x.Segs), len(ends))
	}
	first, off := 0, int64(0)
	for i, end := range ends {
		p.segment(x.Segs[i], off, max(first, from), end, from > first)
		first, off = end, off+int64(x.Segs[i].Size)
	}
	return p.steps, nil
}

type planner struct {
	x       *Index
	chunks  []Chunk
	here    []bool
	packOff []int64 // of each chunk
	steps   []Step
}

// segment plans the chunks from first up to end, those of one segment, or the last ones of it where it is begun.
func (p *planner) segment(s Segment, off int64, first, end int, begun bool) {
	if first >= end {
		return
	}
	var cost, raw int64
	for i := first; i < end; i++ {
		raw += int64(p.chunks[i].Raw)
		if p.here[i] {
			continue
		}
		cost += int64(p.chunks[i].Packed)
		if i > first && p.here[i-1] {
			cost += partCost
		}
	}
	if s.Plain && !begun && cost > int64(s.Size) {
		r := SegmentRange{First: first, Last: end, Size: int64(s.Size), Raw: raw}
		p.add(Step{Kind: Segs, First: first, Last: end, Off: off, Size: r.Size, Segs: []SegmentRange{r}})
		return
	}
	for i := first; i < end; i++ {
		if p.here[i] {
			p.add(Step{Kind: Here, First: i, Last: i + 1})
		} else {
			p.add(Step{Kind: Pack, First: i, Last: i + 1, Off: p.packOff[i], Size: int64(p.chunks[i].Packed)})
		}
	}
}

// add adds a step, or makes the last one longer.
func (p *planner) add(s Step) {
	if n := len(p.steps); n > 0 && p.steps[n-1].Kind == s.Kind {
		last := &p.steps[n-1]
		last.Last, last.Size, last.Segs = s.Last, last.Size+s.Size, append(last.Segs, s.Segs...)
		return
	}
	p.steps = append(p.steps, s)
}
