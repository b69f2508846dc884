use super::*;

#[test]
fn a_byte_that_is_changed_on_its_way_is_found_out() {
    let (sent, counts) = ([1_u16, 2, 3, 4, 5], [2, 0, 3]);
    let of = |buckets: &[&[u16]]| {
        let mut prints = Fingerprints::new(3);
        for bucket in buckets {
            prints.add(bytes_of(bucket), &counts, bytes_of(bucket), &counts);
        }
        assert_eq!(prints.sent, prints.received);
        prints.sent
    };
    let right = of(&[&sent, &sent]);
    assert!(right[1] == [0; 32] && right[0] != right[2]);
    let mut other = sent;
    other[3] ^= 256;
    let [first, last] = [of(&[&other, &sent]), of(&[&sent, &other])];
    assert!(first != last, "the order counts");
    for wrong in [first, last, of(&[&sent])] {
        assert_ne!(wrong[2], right[2]);
    }
    assert_eq!(of(&[&other, &sent])[0], right[0], "only who gets it sees it");
}
