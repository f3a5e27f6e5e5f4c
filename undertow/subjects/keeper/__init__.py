"""The Keeper's world: stories in which what the keeper does follows a bond that is never named, with the truth of each."""
